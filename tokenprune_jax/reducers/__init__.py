"""The methods, one a file: each defines `Method`, and the settings `TINY` and `NEUTRAL` that the shared tests run it with."""
