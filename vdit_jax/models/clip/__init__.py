"""CLIP's encoders, which systems share."""
