//! SVG: the few shapes that the pictures need, on a ground of their own, so that they look the same
//! on a light and on a dark page.

use std::fmt::{Display, Write};

/// What stands on the ground.
pub const INK: &str = "#1d2733";
/// What stands back.
pub const FAINT: &str = "#66727f";
/// Where nothing is stored.
pub const EMPTY: &str = "#e9edf1";

/// A picture under way.
pub struct Svg {
    body: String,
}

/// Where a text stands on its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// Begins there.
    Start,
    /// Ends there.
    End,
}

impl Svg {
    /// An empty picture.
    pub fn new() -> Svg {
        Svg { body: String::new() }
    }

    /// A filled rectangle.
    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: impl Display) {
        // Writing to a String does not fail.
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" {fill}/>"
        );
    }

    /// A dot with a frame.
    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, fill: &str, frame: &str) {
        let _ = writeln!(
            self.body,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{fill}\" \
             stroke=\"{frame}\" stroke-width=\"1.6\"/>"
        );
    }

    /// A line along an SVG path.
    pub fn path(&mut self, along: &str) {
        let _ = writeln!(
            self.body,
            "<path d=\"{along}\" fill=\"none\" stroke=\"#9aa5b1\" stroke-width=\"1.6\"/>"
        );
    }

    /// A text; `class` is one of those that [`finish`](Svg::finish) defines, or empty.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, class: &str, text: &str) {
        let end = if matches!(anchor, Anchor::End) { " text-anchor=\"end\"" } else { "" };
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let text = escaped(text);
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{y:.1}\"{end}{class}>{text}</text>");
    }

    /// What a pointer that rests on the shapes that `draw` adds is told.
    pub fn group(&mut self, title: &str, draw: impl FnOnce(&mut Svg)) {
        let _ = writeln!(self.body, "<g><title>{}</title>", escaped(title));
        draw(self);
        self.body.push_str("</g>\n");
    }

    /// Shapes as they are.
    pub fn raw(&mut self, shapes: &str) {
        self.body.push_str(shapes);
    }

    /// The whole document.
    pub fn finish(self, (width, height): (f64, f64), title: &str) -> String {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n<title>{}</title>\n\
             <style>text{{font:13px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;\
             fill:{INK};white-space:pre}}.faint{{fill:{FAINT}}}.small{{font-size:11px;fill:{FAINT}}}\
             .strong{{font-weight:bold}}.title{{font-size:15px;font-weight:bold}}</style>\n\
             <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#ffffff\" stroke=\"#cbd2d9\"/>\n\
             {}</svg>\n",
            escaped(title),
            self.body
        )
    }
}

/// How wide a text of the usual size is, about.
pub fn width(text: &str) -> f64 {
    // Wide characters take two places.
    let places = |c: char| if u32::from(c) >= 0x1100 { 2.0 } else { 1.0 };
    text.chars().map(places).sum::<f64>() * 7.9
}

/// A text as it stands in XML.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in super::plain(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // These two are no characters in XML.
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_texts_are_only_text() {
        let mut svg = Svg::new();
        svg.text((0.0, 0.0), Anchor::Start, "", "</text><script>\u{1b}[2J\u{ffff}\"'&");
        let picture = svg.finish((1.0, 1.0), "<&>");
        assert!(!picture.contains("<script>") && !picture.contains('\u{1b}'));
        assert!(picture.contains("&lt;/text&gt;&lt;script&gt;\u{fffd}[2J\u{fffd}&quot;&#39;&amp;"));
        assert!(picture.contains("<title>&lt;&amp;&gt;</title>"));
    }
}
