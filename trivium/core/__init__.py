"""Floor 0: specs, configuration, registries, errors, seeds, devices and the log."""
