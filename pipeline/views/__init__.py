"""Views: pixels as a pure function of (view recipe, seed, key digest, view number, output size).

    compiled    how all of it is compiled
    draws       the counter-based generator and its tables
    geometry    crop and flip
    policies    which operations, and how strong
    mixing      what is erased, and what is mixed in
    resize, color, spatial    the arithmetic on pixels
    render      all of it in one pass

Parameters use integers, IEEE square roots and rounded tables; pixels use integers, or doubles whose every operation is
exact or correctly rounded, without contraction. They are the same on every machine with the same JPEG decoder.
"""
