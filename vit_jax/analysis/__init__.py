"""What a model is and costs: layers, parameters, FLOPs, memory."""
