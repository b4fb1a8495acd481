"""What a model and a run are, as frozen data: no torch, no files but the presets."""
