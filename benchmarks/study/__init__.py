"""Does each piece of Franca help? Arms that differ in one thing, trained on equal budgets."""
