"""The endpoint: images and texts to embeddings over HTTP, on Ray Serve."""
