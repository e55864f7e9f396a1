"""Attach policies to pipelines, find attachments, and undo them."""
