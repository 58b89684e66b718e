"""softshard: precompute a teacher's soft labels once, train compact re-parameterized students from them."""
