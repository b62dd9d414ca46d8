"""Full models: load one, find its blocks, build a smaller model from some of them."""
