"""TensorBoard, Weights & Biases, MLflow and a webhook, told of a run by its events."""
