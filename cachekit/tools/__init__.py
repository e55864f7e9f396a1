"""What is made of the engine: images of many prompts, calibrations, measurements, searches, the app."""
