"""Control images of ControlNets: edges, depth and poses of any image, and which images are such."""
