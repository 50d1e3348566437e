"""What a device takes for what a model asks: regression of measured times on counted work."""
