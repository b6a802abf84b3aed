"""Small networks where they run: as ONNX, and what they cost in the runtime of one's choice."""
