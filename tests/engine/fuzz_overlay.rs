//! The body of the fuzz target over an overlay's layers, with a seed.

use crate::dice::rounds;
use crate::hostile::patiently;
use crate::overlay;

#[test]
fn whatever_layers_say_an_overlay_of_them_is_a_tree() {
    rounds(2, |dice| {
        let records = 1 + dice.below(40);
        let bytes: Vec<u8> = (0..1 + 6 * records).map(|_| dice.next() as u8).collect();
        patiently(|| overlay::overlay(&bytes));
    });
}

/// A whiteout of the name of another, which stands in a layer below and hides a file of the lowest: that was listed,
/// and not to be found.
#[test]
fn what_hides_a_whiteout_s_name_leaves_what_that_hides_hidden() {
    let file = |layer: u8, name: u8| [layer, 0, name, 3, 0, 0];
    let (a, hides_a, hides_that) = (0, 4, 10);
    let layers = [file(0, hides_that), file(1, hides_a), file(2, a)].concat();
    overlay::overlay(&[&[2][..], &layers].concat());
}
