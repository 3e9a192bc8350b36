// Package loss loses hosts and targets under the real gateway: what the targets hold must be enough, with
// any one of them gone. The tests use a disk image such as people have, and disks under load.
package loss
