"""What a person sees of a run: metrics, pictures, the terminal."""
