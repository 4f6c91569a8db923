"""Complete methods, assembled from the parts on the engine of `sslkit.training`."""
