"""The batteries: components that ship with tuneforge. They import only what it exports, like anybody's."""
