//! Plots of a quantity over the size, as SVG.
