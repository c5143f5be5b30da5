"""The strategies that come with tuneforge."""
