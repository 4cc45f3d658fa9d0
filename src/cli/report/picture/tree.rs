//! A forest as SVG: rows with dots and lines in front, sizes behind.

use super::rows::Row;
use super::svg::{Anchor, EMPTY, INK, Svg, width};
use super::{plain, short};
use crate::cli::terminal::size;

/// More rows than these are only counted.
const MAX_ROWS: usize = 2000;
/// Columns are not indented further than this many steps.
const MAX_COLUMNS: usize = 40;
const ROW: f64 = 26.0;
const STEP: f64 = 22.0;
const EDGE: f64 = 24.0;
const TOP: f64 = 66.0;
const BAR: f64 = 120.0;
/// Characters of a name that are shown.
const NAME: usize = 60;

/// What a row says.
pub struct Facts {
    /// The name.
    pub name: String,
    /// What it is, in a word or two.
    pub kind: &'static str,
    /// The colour of its dot.
    pub colour: &'static str,
    /// The size that a guest sees.
    pub size: Option<u64>,
    /// Bytes on the host; `None` where it is missing.
    pub allocated: Option<u64>,
    /// Bytes of data that only it shows.
    pub exclusive: Option<u64>,
    /// Whether the user named this one.
    pub here: bool,
}

/// The picture of rows and what they say.
pub fn svg(rows: &[Row<'_>], facts: &[Facts], legend: &[(&str, &str)]) -> String {
    let shown = rows.len().min(MAX_ROWS);
    let (rows, all) = (&rows[..shown], rows.len());
    let place = |row: usize| {
        let column = rows.get(row).map_or(0, |r| r.column.min(MAX_COLUMNS));
        (EDGE + column as f64 * STEP, TOP + row as f64 * ROW)
    };
    let names: Vec<String> = facts.iter().map(|f| short(&plain(&f.name), NAME)).collect();
    let ends = names.iter().take(shown).enumerate().map(|(n, name)| place(n).0 + width(name));
    let kind = ends.fold(200.0, f64::max) + 44.0;
    let columns = [kind + 200.0, kind + 290.0, kind + 380.0];
    let bar = columns[2] + 24.0;
    let mut svg = Svg::new();
    svg.text((EDGE - 6.0, 30.0), Anchor::Start, "title", "Layers");
    svg.text((kind, TOP - 22.0), Anchor::Start, "small", "what");
    for (x, head) in columns.into_iter().zip(["size", "on host", "exclusive"]) {
        svg.text((x, TOP - 22.0), Anchor::End, "small", head);
    }
    for (number, row) in rows.iter().enumerate() {
        if let Some(parent) = row.parent {
            svg.path(&line(place(parent), place(number)));
        }
    }
    let most = facts.iter().filter_map(|f| f.allocated).max().unwrap_or(0).max(1);
    let known = |bytes: Option<u64>| bytes.map_or("–".to_owned(), size::human);
    for (number, ((row, fact), name)) in rows.iter().zip(facts).zip(&names).enumerate() {
        let (x, y) = place(number);
        svg.group(&row.node.path.display().to_string(), |svg| {
            if fact.here {
                svg.circle((x, y), 9.5, "#ffffff", fact.colour);
            }
            svg.circle((x, y), 5.5, fact.colour, INK);
            let class = if fact.here { "strong" } else { "" };
            svg.text((x + 16.0, y + 4.5), Anchor::Start, class, name);
            svg.text((kind, y + 4.5), Anchor::Start, "faint", fact.kind);
            let host = fact.allocated.map_or("missing".to_owned(), size::human);
            let texts = [known(fact.size), host, known(fact.exclusive)];
            for (x, text) in columns.into_iter().zip(texts) {
                svg.text((x, y + 4.5), Anchor::End, "", &text);
            }
            draw_bar(svg, (bar, y - 6.0), fact, most);
        });
    }
    let mut bottom = TOP + shown as f64 * ROW;
    if all > shown {
        svg.text((EDGE, bottom), Anchor::Start, "faint", &format!("… and {} more", all - shown));
        bottom += ROW;
    }
    let end = draw_legend(&mut svg, bottom + 10.0, legend);
    svg.finish(((bar + BAR + EDGE).max(end), bottom + 36.0), "Layers and what stands on them")
}

/// From a parent down and, where it has a column of its own, over to the child.
fn line((px, py): (f64, f64), (x, y): (f64, f64)) -> String {
    if px == x {
        return format!("M{px:.1} {py:.1}V{y:.1}");
    }
    format!("M{px:.1} {py:.1}V{:.1}Q{px:.1} {y:.1} {:.1} {y:.1}H{x:.1}", y - 9.0, px + 9.0)
}

/// What it takes of the most that one takes, and how much of that only it shows.
fn draw_bar(svg: &mut Svg, (x, y): (f64, f64), fact: &Facts, most: u64) {
    let Some(bytes) = fact.allocated else { return };
    let long = |bytes: u64| bytes.min(most) as f64 / most as f64 * BAR;
    svg.rect((x, y), (BAR, 11.0), format_args!("rx=\"2\" fill=\"{EMPTY}\""));
    let light = format_args!("rx=\"2\" fill=\"{}\" fill-opacity=\"0.4\"", fact.colour);
    svg.rect((x, y), (long(bytes).max(1.0), 11.0), light);
    if let Some(exclusive) = fact.exclusive.filter(|e| *e > 0) {
        let own = format_args!("rx=\"2\" fill=\"{}\"", fact.colour);
        svg.rect((x, y), (long(exclusive.min(bytes)).max(1.0), 11.0), own);
    }
}

fn draw_legend(svg: &mut Svg, y: f64, legend: &[(&str, &str)]) -> f64 {
    let mut x = EDGE;
    for (colour, text) in legend {
        svg.circle((x, y), 4.5, colour, INK);
        svg.text((x + 10.0, y + 4.0), Anchor::Start, "small", text);
        x += 34.0 + text.chars().count() as f64 * 6.7;
    }
    let text = "bar: on host, and full: exclusive, what nothing else shows";
    svg.text((x, y + 4.0), Anchor::Start, "small", text);
    x + text.chars().count() as f64 * 6.7 + EDGE
}
