"""A small package beside ditkit: two backbones and three methods, registered by entry points. They get the contract tests."""
