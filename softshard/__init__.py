"""softshard: precompute a teacher's soft labels once, train compact re-parameterised students from them."""
