"""What a checkpoint's folder holds, for those who look for one without PyTorch."""

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CONFIG_DIGEST = "config_sha256"  # in the weights' metadata: of the configuration they belong to
