"""The app in a browser: choosing policies, their plan and estimate, and pictures side by side."""
