"""Human evaluation: a page for blind comparisons of generated texts, and its analysis.

    build      writes the page, and the key that tells which text is of which method
    analyse    reads the files that raters export, and gives preferences, intervals and agreement

The two questions are the paper's (Meng et al. 2022, human evaluation): which text is more
consistent with the edited fact, and which is more fluent.
"""

from transformer_lens_rome.rate.agreement import krippendorff_alpha
from transformer_lens_rome.rate.analysis import Preferences, Share, analyse
from transformer_lens_rome.rate.key import Key
from transformer_lens_rome.rate.page import build

__all__ = ["Key", "Preferences", "Share", "analyse", "build", "krippendorff_alpha"]
