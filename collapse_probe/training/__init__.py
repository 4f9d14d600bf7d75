"""The verbs that need gradients: train and sweep."""
