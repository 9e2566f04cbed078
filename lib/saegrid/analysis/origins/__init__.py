"""Over models, layers, sites and texts: how measures move, and which claims hold where. Free of torch and HTML."""
