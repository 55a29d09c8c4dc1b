"""Parts that two models share."""
