"""Where weights come from: our workdirs, releases of others, random ones."""
