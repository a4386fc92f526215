"""IP-Adapter and the methods that share its layers: FaceID and InstantID."""
