"""Convert image data sets to beton files that FFCV reads, verified, and without loss where possible."""
