"""What a checkpoint's folder holds, for those who look for one without PyTorch."""

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
