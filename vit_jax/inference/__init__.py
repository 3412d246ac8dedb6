"""Using a model: its folder, classifiers, predictions, labels and metrics."""
