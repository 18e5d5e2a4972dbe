"""Image data sets -> beton files that FFCV reads, verified and without loss where possible."""
