//! Trees as rows: a disk's line of snapshots goes straight down, what branches off is indented.

use vdisk::family::forest::Node;
use vdisk::image::Role;

/// One node's row.
pub struct Row<'a> {
    /// The node.
    pub node: &'a Node,
    /// How far it is indented.
    pub column: usize,
    /// The row of the node that it stands on.
    pub parent: Option<usize>,
    /// The lines that lead to it, for a terminal.
    pub lead: String,
}

/// The rows of all trees, in the order in which they are shown.
pub fn of(trees: &[Node]) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for tree in trees {
        place(tree, 0, None, "", "", &mut rows);
    }
    rows
}

/// Adds the rows of `node`, behind `first`, and of all on it, behind `rest`.
fn place<'a>(
    mut node: &'a Node,
    column: usize,
    mut parent: Option<usize>,
    first: &str,
    rest: &str,
    rows: &mut Vec<Row<'a>>,
) {
    let mut lead = first.to_owned();
    loop {
        let row = rows.len();
        rows.push(Row { node, column, parent, lead });
        let next = goes_on(node);
        let is_next = |child: &&Node| next.is_some_and(|next| std::ptr::eq(next, *child));
        let branches: Vec<&Node> = node.children.iter().filter(|c| !is_next(c)).collect();
        for (number, branch) in branches.iter().enumerate() {
            let last = number + 1 == branches.len() && next.is_none();
            let (turn, pass) = if last { ("└─", "  ") } else { ("├─", "│ ") };
            let (first, rest) = (format!("{rest}{turn}"), format!("{rest}{pass}"));
            place(branch, column + 1, Some(row), &first, &rest, rows);
        }
        let Some(next) = next else { return };
        (node, parent, lead) = (next, Some(row), rest.to_owned());
    }
}

/// The child that carries the node's own disk on: towards the head where there are several.
fn goes_on(node: &Node) -> Option<&Node> {
    let disk = node.label()?.disk;
    let own = |child: &&Node| child.label().is_some_and(|l| l.disk == disk);
    let mut all = node.children.iter().filter(own);
    let first = all.next()?;
    let mut last = first;
    let mut several = false;
    for child in all {
        (last, several) = (child, true);
    }
    let heads = || node.children.iter().filter(own).find(|child| holds_head(child, disk));
    if several { Some(heads().unwrap_or(last)) } else { Some(first) }
}

fn holds_head(node: &Node, disk: vdisk::image::Id) -> bool {
    let is_head = |l: &vdisk::image::Label| l.disk == disk && l.role == Role::Head;
    node.label().is_some_and(is_head) || node.children.iter().any(|c| holds_head(c, disk))
}
