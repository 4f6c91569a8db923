"""What parts compute, as float64 loops from the equations, each file with its sources."""
