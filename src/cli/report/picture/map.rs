//! A disk as SVG: a grid of equal parts, each in the colour of the layer that most of it comes from.

use super::svg::{Anchor, EMPTY, Svg};
use super::{plain, short};
use crate::cli::terminal::size;

/// The most parts.
const MAX_PARTS: u64 = 4096;
/// The least that a part stands for, in bytes.
const MIN_PART: u64 = 4096;
/// The most layers that are counted in one part: others are too thin to be seen there.
const MAX_IN_PART: usize = 16;
/// The most layers that the legend names.
const NAMED: usize = 24;
/// The width of the grid.
const WIDTH: f64 = 896.0;
const LEFT: f64 = 84.0;
const TOP: f64 = 56.0;

/// Colours that are told apart also by those who see few of them.
const COLOURS: [&str; 10] = [
    "#e8743b", "#3b7dd8", "#3f9c5a", "#8e5bb5", "#d4a417", "#2aa5a0", "#c9476b", "#7a5c43",
    "#5b6ee1", "#8a9a1f",
];

/// What is in one part.
#[derive(Clone, Default)]
struct Part {
    /// Bytes of data by the depth of their layer.
    data: Vec<(usize, u64)>,
    /// Bytes that a layer says are zero.
    zero: u64,
}

impl Part {
    fn add(&mut self, depth: usize, len: u64) {
        let room = self.data.len() < MAX_IN_PART;
        match self.data.iter_mut().find(|(d, _)| *d == depth) {
            Some((_, bytes)) => *bytes += len,
            None if room => self.data.push((depth, len)),
            None => {}
        }
    }
}

/// A disk that is looked at piece by piece.
pub struct Grid {
    size: u64,
    part: u64,
    parts: Vec<Part>,
    /// Bytes of data by layer.
    totals: Vec<u64>,
    zero: u64,
}

/// What a part of the disk is shown as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Nothing,
    Zero,
    /// A layer, and how much of the part is data, in quarters from 1.
    Layer(usize, u8),
}

impl Grid {
    /// An empty grid for a disk of `size` bytes and `layers` layers.
    pub fn new(size: u64, layers: usize) -> Grid {
        let part = size.div_ceil(MAX_PARTS).max(MIN_PART).next_power_of_two();
        let count = size.div_ceil(part).max(1) as usize;
        Grid { size, part, parts: vec![Part::default(); count], totals: vec![0; layers], zero: 0 }
    }

    /// Adds a stretch of data of the layer at `depth`, or of zeroes.
    pub fn add(&mut self, start: u64, len: u64, depth: Option<usize>) {
        match depth.and_then(|depth| self.totals.get_mut(depth)) {
            Some(total) => *total += len,
            None => self.zero += len,
        }
        let (mut at, end) = (start, start.saturating_add(len).min(self.size));
        while at < end {
            let to = (at / self.part + 1).saturating_mul(self.part).min(end);
            let Some(part) = self.parts.get_mut((at / self.part) as usize) else { return };
            match depth {
                Some(depth) => part.add(depth, to - at),
                None => part.zero += to - at,
            }
            at = to;
        }
    }

    fn look(&self, part: &Part) -> Look {
        let data: u64 = part.data.iter().map(|(_, bytes)| bytes).sum();
        // Where two are equal, the upper layer is shown.
        let most =
            part.data.iter().max_by_key(|(depth, bytes)| (*bytes, std::cmp::Reverse(*depth)));
        match most {
            Some((depth, _)) => {
                let quarters = (data.saturating_mul(4)).div_ceil(self.part).clamp(1, 4);
                Look::Layer(*depth, quarters as u8)
            }
            None if part.zero > 0 => Look::Zero,
            None => Look::Nothing,
        }
    }

    /// The picture; `names` are the layers' from the head down.
    pub fn svg(&self, title: &str, names: &[String]) -> String {
        let columns = if self.parts.len() > 1024 { 128 } else { 64 };
        let step = WIDTH / columns as f64;
        let rows = self.parts.len().div_ceil(columns);
        let mut svg = Svg::new();
        let said = format!(
            "{}, {}; one square is {}",
            short(&plain(title), 60),
            size::human(self.size),
            size::human(self.part)
        );
        svg.text((16.0, 30.0), Anchor::Start, "title", &said);
        svg.raw(&format!(
            "<defs><pattern id=\"zero\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" \
             patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"{EMPTY}\"/><rect \
             width=\"2\" height=\"6\" fill=\"#b4bec9\"/></pattern><pattern id=\"grid\" \
             width=\"{step}\" height=\"{step}\" patternUnits=\"userSpaceOnUse\" x=\"{LEFT}\" \
             y=\"{TOP}\"><path d=\"M{step} 0H0V{step}\" fill=\"none\" stroke=\"#ffffff\"/>\
             </pattern></defs>\n"
        ));
        for (row, parts) in self.parts.chunks(columns).enumerate() {
            let y = TOP + row as f64 * step;
            if rows <= 16 || row % 2 == 0 {
                let offset = size::human((row * columns) as u64 * self.part);
                svg.text((LEFT - 8.0, y + step / 2.0 + 4.0), Anchor::End, "small", &offset);
            }
            self.draw_row(&mut svg, y, step, parts);
        }
        let whole = (columns as f64 * step, rows as f64 * step);
        svg.rect((LEFT, TOP), whole, "fill=\"url(#grid)\"");
        let bottom = self.draw_legend(&mut svg, TOP + whole.1 + 30.0, names);
        svg.finish((LEFT + WIDTH + 24.0, bottom + 8.0), &said)
    }

    /// Parts that look the same and stand side by side are one shape.
    fn draw_row(&self, svg: &mut Svg, y: f64, step: f64, parts: &[Part]) {
        let looks: Vec<Look> = parts.iter().map(|part| self.look(part)).collect();
        let mut x = LEFT;
        for run in looks.chunk_by(|a, b| a == b) {
            let wide = run.len() as f64 * step;
            let fill = match run.first() {
                Some(Look::Layer(depth, quarters)) => {
                    let opacity = f64::from(*quarters) * 0.2 + 0.2;
                    format!("fill=\"{}\" fill-opacity=\"{opacity:.1}\"", colour(*depth))
                }
                Some(Look::Zero) => "fill=\"url(#zero)\"".to_owned(),
                _ => format!("fill=\"{EMPTY}\""),
            };
            svg.rect((x, y), (wide, step), fill);
            x += wide;
        }
    }

    fn draw_legend(&self, svg: &mut Svg, top: f64, names: &[String]) -> f64 {
        let mut y = top;
        let mut line = |fill: &str, text: &str, bytes: Option<u64>| {
            svg.rect((LEFT, y - 11.0), (14.0, 14.0), format_args!("rx=\"2\" {fill}"));
            svg.text((LEFT + 24.0, y), Anchor::Start, "", text);
            if let Some(bytes) = bytes {
                let part = bytes as f64 * 100.0 / self.size.max(1) as f64;
                svg.text((LEFT + WIDTH - 90.0, y), Anchor::End, "", &size::human(bytes));
                svg.text((LEFT + WIDTH, y), Anchor::End, "faint", &format!("{part:.1}%"));
            }
            y += 22.0;
        };
        let seen: Vec<(usize, u64)> =
            self.totals.iter().copied().enumerate().filter(|(_, bytes)| *bytes > 0).collect();
        for (depth, bytes) in seen.iter().take(NAMED) {
            let name = names.get(*depth).map_or("", |name| name);
            let text = format!("{depth:>3}  {}", short(&plain(name), 70));
            line(&format!("fill=\"{}\"", colour(*depth)), &text, Some(*bytes));
        }
        if seen.len() > NAMED {
            let bytes = seen.iter().skip(NAMED).map(|(_, bytes)| bytes).sum();
            let text = format!("     {} more layers", seen.len() - NAMED);
            line("fill=\"none\" stroke=\"#9aa5b1\"", &text, Some(bytes));
        }
        line("fill=\"url(#zero)\"", "     zeroes, stored as such", Some(self.zero));
        let used: u64 = self.totals.iter().sum::<u64>() + self.zero;
        let left = self.size.saturating_sub(used);
        line(&format!("fill=\"{EMPTY}\""), "     nothing stored", Some(left));
        line("fill=\"none\"", "     paler: less of the square is data", None);
        y
    }
}

/// The colour of the layer at `depth`. Beyond the first ten, hues far from their neighbours'.
fn colour(depth: usize) -> String {
    match COLOURS.get(depth) {
        Some(colour) => (*colour).to_owned(),
        None => format!("hsl({},{}%,45%)", depth * 137 % 360, 45 + depth % 3 * 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_shows_the_layer_that_most_of_it_comes_from() {
        let mut grid = Grid::new(1 << 40, 3);
        assert_eq!((grid.part, grid.parts.len()), (1 << 28, 4096));
        grid.add(0, 1 << 27, Some(2));
        grid.add(1 << 27, 1 << 20, Some(0));
        grid.add(1 << 28, 3 << 28, Some(0));
        grid.add(1 << 39, 4096, None);
        let looks: Vec<Look> = grid.parts.iter().map(|part| grid.look(part)).collect();
        assert!(looks[0] == Look::Layer(2, 3) && looks[1..4] == [Look::Layer(0, 4); 3]);
        assert!(looks[2048] == Look::Zero && looks[4095] == Look::Nothing);
        assert_eq!((grid.totals[0], grid.zero), ((3 << 28) + (1 << 20), 4096));
    }

    #[test]
    fn a_picture_of_a_million_pieces_is_small() {
        let mut grid = Grid::new(1 << 40, 300);
        for piece in 0..1_000_000u64 {
            grid.add(piece << 20, 4096, Some((piece % 300) as usize));
        }
        let names: Vec<String> = (0..300).map(|n| format!("<layer {n}>")).collect();
        let picture = grid.svg("a & b", &names);
        assert!(picture.len() < 1 << 20, "{}", picture.len());
        assert!(!picture.contains("<layer") && picture.contains("276 more layers"));
    }
}
