"""Views: pixels as a pure function of (view recipe, seed, key digest, view number, output size).

    kernels/jit    how all of it is compiled
    kernels/rng    the counter-based generator and its tables
    kernels/resize, color, spatial    the arithmetic on pixels
    parameters     a recipe as numbers
    geometry       crop and flip
    policies       which operations, and how strong
    mixing         what is erased, and what is mixed in
    render         all of it in one pass
    loader, batch  rows and view numbers -> batches of pixels
    describe, contact_sheet    views in words and as pictures
    golden         probes that notice when pixels change
    selection      --views

Parameters use integers, IEEE square roots and rounded tables; pixels use integers, or doubles whose every operation is
exact or correctly rounded, without contraction. They are the same on every machine with the same JPEG decoder.
"""
