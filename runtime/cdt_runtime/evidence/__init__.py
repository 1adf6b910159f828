"""Why a tile got its answer: what speaks for it, what would change it, and a page that shows it."""
