"""What a run is: parameters, architectures, recipes and grids. Free of torch."""
