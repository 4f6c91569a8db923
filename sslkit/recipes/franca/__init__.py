"""What the recipe of Franca stands on: its settings, presets, first weights, scores and report.

The method itself is `examples/franca_recipe.py`, which `sslkit.recipes.franca.recipe` is a link to.
"""
