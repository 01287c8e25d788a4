"""One thin module an engine: it turns the engine's storage and config into what the optimizer's core understands."""
