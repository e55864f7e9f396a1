"""Images of a file of prompts: rows, drawing, and the folder that they are kept in."""
