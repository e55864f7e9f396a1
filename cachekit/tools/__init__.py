"""What is built on the engine: images of many prompts, calibrations, measurements, searches, the app."""
