"""What a measurement keeps of the images it has seen: small, whatever their number, and the same whatever their order."""
