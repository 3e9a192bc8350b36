package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/block"
	"graindisk/config"
	"graindisk/pool"
)

// The commands that operate on whole disks, and the running gateway's part of them.

func newDiskDeleteCmd(a *app) *cobra.Command {
	var o api.DeleteDisk
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a disk; it can be had back for a while",
		Long: `Delete the disk NAME: the name is free at once. For undelete_window (24 h) "gateway disk undelete" brings
it back; after that its data leave the targets. A disk that clients have open is not deleted without --force,
which has their requests fail (ESHUTDOWN).`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err == nil {
				err = c.DeleteDisk(cmd.Context(), args[0], o)
			}
			if err != nil {
				return err
			}
			return a.printDone(map[string]any{"deleted": args[0], "purged": o.Purge}, "disk %s: deleted\n", args[0])
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "though clients have it open")
	cmd.Flags().BoolVar(&o.Purge, "purge", false, "for good: it cannot be had back")
	return cmd
}

func newDiskUndeleteCmd(a *app) *cobra.Command {
	var o api.UndeleteDisk
	cmd := &cobra.Command{
		Use:   "undelete NAME",
		Short: "Bring back the disk that was deleted last under a name",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.As != "" {
				if err := config.CheckDiskName(o.As); err != nil {
					return usagef("%w", err)
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.UndeleteDisk(cmd.Context(), args[0], o)
			if err != nil {
				return err
			}
			return a.printDone(d, "disk %s: %s in pool %s is back\n", d.Name, sized(d.SizeBytes), d.Pool)
		},
	}
	cmd.Flags().StringVar(&o.As, "as", "", "under this name; its own may be taken")
	cmd.Flags().Uint32Var(&o.ID, "id", 0, "the one with this number; see \"gateway disk list --deleted\"")
	return cmd
}

func newDiskRenameCmd(a *app) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rename NAME NEWNAME",
		Short: "Give a disk another name",
		Long: `Give a disk another name. Clients that have it open keep it; they find it under the new name when they
connect again. Access rules in the configuration go by name: a disk that has some is renamed with --force only,
and the configuration should be changed first.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := config.CheckDiskName(args[1]); err != nil {
				return usagef("%w", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.RenameDisk(cmd.Context(), args[0], api.RenameDisk{To: args[1], Force: force})
			if err != nil {
				return err
			}
			return a.printDone(d, "disk %s: was %s\n", d.Name, args[0])
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "though access rules go by the old name")
	return cmd
}

func newDiskResizeCmd(a *app) *cobra.Command {
	var shrink bool
	cmd := &cobra.Command{
		Use:   "resize NAME SIZE",
		Short: "Make a disk longer or shorter",
		Long: `Make a disk SIZE long (10GiB, 500MB, ...; a multiple of 4 KiB from 1 MiB to 64 TiB). What is added is zeroes;
what --shrink cuts off is gone. An NBD client learns the size when it connects: reconnect it.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := config.ParseSize(args[1])
			if err != nil {
				return usagef("%w", err)
			}
			if err := config.CheckDiskSize(size); err != nil {
				return usagef("%w", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.ResizeDisk(cmd.Context(), args[0], api.ResizeDisk{SizeBytes: int64(size), Shrink: shrink})
			if err != nil {
				return err
			}
			return a.printDone(d, "disk %s: %s; clients that are connected see it when they reconnect\n", d.Name, sized(d.SizeBytes))
		},
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "it may lose its end")
	return cmd
}

func newPoolFsckCmd(a *app) *cobra.Command {
	var o api.Fsck
	cmd := &cobra.Command{
		Use:   "fsck NAME",
		Short: "Count anew what the disks have of every segment, on a running gateway",
		Long: `Count anew what the maps of all disks have of every segment, and compare with the counts that decide what
may be deleted. A count that is too high is a leak: space that is not gained back. One that is too low, or a map that
names what is not stored, is damage: exit code 3. With --orphans the targets are listed for segments that no map knows
and no process will finish; --reclaim has those deleted after the grace.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolFsck(cmd.Context(), a, args[0], o) },
	}
	cmd.Flags().BoolVar(&o.Orphans, "orphans", false, "list the targets too")
	cmd.Flags().BoolVar(&o.Reclaim, "reclaim", false, "with --orphans: have what is found deleted after the grace")
	return cmd
}

func runPoolFsck(ctx context.Context, a *app, name string, o api.Fsck) error {
	if o.Reclaim && !o.Orphans {
		return usagef("--reclaim goes with --orphans")
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	r, err := c.Fsck(ctx, name, o)
	if err != nil {
		return err
	}
	if a.json {
		err = a.printJSON(r)
	} else {
		fmt.Fprintf(a.stdout, "pool %s: %d segments counted, %d counts too high, %d too low\n", r.Pool, r.Segments, len(r.Leaks), len(r.Low))
		for _, s := range append(r.Low, r.Leaks...) {
			fmt.Fprintf(a.stdout, "  %s\n", s)
		}
		if r.Orphans >= 0 {
			fmt.Fprintf(a.stdout, "  %d orphans, %s\n", r.Orphans, sized(r.OrphanBytes))
			if r.Strays > 0 {
				fmt.Fprintf(a.stdout, "  %d shards where no row has them, %s: they go with their segments\n", r.Strays, sized(r.StrayBytes))
			}
		}
	}
	if err == nil && r.Bad() {
		err = fmt.Errorf("pool %s: %w", name, errors.Join(errCounts, errors.New(r.Damage)))
		if r.Damage == "" {
			err = fmt.Errorf("pool %s: %w", name, errCounts)
		}
	}
	return err
}

// errCounts is damage that fsck found.
var errCounts = errors.New("some counts are too low: nothing is deleted from those segments; stop and start the gateway, which counts anew")

// printDone prints the outcome of an operation, as JSON or as one line.
func (a *app) printDone(v any, format string, args ...any) error {
	if a.json {
		return a.printJSON(v)
	}
	_, err := fmt.Fprintf(a.stdout, format, args...)
	return err
}

func (a *app) listDeleted(ctx context.Context) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	ds, err := c.DeletedDisks(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(ds)
	}
	t := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tID\tPOOL\tSIZE\tDELETED\tUNTIL")
	for _, d := range ds {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n", d.Name, d.ID, d.Pool, sized(d.SizeBytes),
			clock(d.DeletedAt), clock(d.Until))
	}
	return t.Flush()
}

// DeletedDisks implements api.Gateway.
func (g *gateway) DeletedDisks() []pool.DeletedDisk {
	ds := []pool.DeletedDisk{}
	for _, p := range g.sorted() {
		ds = append(ds, p.DeletedDisks(false)...)
	}
	return ds
}

// DeleteDisk implements api.Gateway.
func (g *gateway) DeleteDisk(ctx context.Context, name string, o api.DeleteDisk) error {
	p, _, err := g.find(name)
	if err != nil {
		return err
	}
	return p.DeleteDisk(ctx, name, o.Force, o.Purge)
}

// UndeleteDisk implements api.Gateway.
func (g *gateway) UndeleteDisk(ctx context.Context, name string, o api.UndeleteDisk) (pool.DiskInfo, error) {
	as := name
	if o.As != "" {
		as = o.As
	}
	if err := config.CheckDiskName(as); err != nil {
		return pool.DiskInfo{}, fmt.Errorf("%w: %w", api.ErrBadRequest, err)
	}
	err := error(fmt.Errorf("undelete disk %s: %w that can be had back; see \"gateway disk list --deleted\"", name, pool.ErrNoDisk))
	if !slices.ContainsFunc(g.DeletedDisks(), func(d pool.DeletedDisk) bool { return d.Name == name }) {
		return pool.DiskInfo{}, err
	}
	g.naming.Lock()
	defer g.naming.Unlock()
	if g.free(as) != nil {
		return pool.DiskInfo{}, fmt.Errorf("undelete disk %s: %w of the name %s; bring it back under another one with --as", name, pool.ErrExists, as)
	}
	for _, p := range g.sorted() {
		d, perr := p.UndeleteDisk(ctx, name, block.DiskID(o.ID), as)
		if perr == nil {
			return p.Describe(d), nil
		}
		if !errors.Is(perr, pool.ErrNoDisk) {
			err = perr
		}
	}
	return pool.DiskInfo{}, err
}

// RenameDisk implements api.Gateway.
func (g *gateway) RenameDisk(ctx context.Context, name string, o api.RenameDisk) (pool.DiskInfo, error) {
	if err := config.CheckDiskName(o.To); err != nil {
		return pool.DiskInfo{}, fmt.Errorf("%w: %w", api.ErrBadRequest, err)
	}
	g.naming.Lock()
	defer g.naming.Unlock()
	p, _, err := g.find(name)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	if err := g.free(o.To); err != nil {
		return pool.DiskInfo{}, fmt.Errorf("rename disk %s to %s: %w", name, o.To, err)
	}
	_, ruled := (*g.grants.Load())[name]
	_, will := (*g.grants.Load())[o.To]
	if ruled && !will && !o.Force {
		return pool.DiskInfo{}, fmt.Errorf("%w: rename disk %s: its access rules go by that name, and %s has none: anyone could use it; change the configuration first, or --force", api.ErrBadRequest, name, o.To)
	}
	d, err := p.RenameDisk(ctx, name, o.To, g.configured[name])
	if err != nil {
		return pool.DiskInfo{}, err
	}
	return p.Describe(d), nil
}

// ResizeDisk implements api.Gateway.
func (g *gateway) ResizeDisk(ctx context.Context, name string, o api.ResizeDisk) (pool.DiskInfo, error) {
	if err := config.CheckDiskSize(config.Bytes(o.SizeBytes)); err != nil {
		return pool.DiskInfo{}, fmt.Errorf("%w: %w", api.ErrBadRequest, err)
	}
	p, _, err := g.find(name)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	d, err := p.ResizeDisk(ctx, name, o.SizeBytes, o.Shrink)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	return p.Describe(d), nil
}

// Fsck implements api.Gateway.
func (g *gateway) Fsck(ctx context.Context, name string, o api.Fsck) (pool.FsckReport, error) {
	p, err := g.poolOf(name)
	if err != nil {
		return pool.FsckReport{}, err
	}
	return p.Fsck(ctx, o.Orphans, o.Reclaim)
}

// free fails if a disk of any pool has the name. The caller holds naming.
func (g *gateway) free(name string) error {
	if _, _, err := g.find(name); err == nil {
		return fmt.Errorf("%w; choose another name", pool.ErrExists)
	}
	return nil
}
