package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/config"
	"graindisk/pool"
)

func newDiskCmd(a *app) *cobra.Command {
	return newGroupCmd("disk", "Create, list, change and delete the disks of a running gateway",
		newDiskCreateCmd(a),
		newDiskListCmd(a),
		newDiskShowCmd(a),
		newDiskDeleteCmd(a),
		newDiskUndeleteCmd(a),
		newDiskRenameCmd(a),
		newDiskResizeCmd(a),
	)
}

// client talks to the gateway that the global flags name.
func (a *app) client() (*api.Client, error) {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return nil, err
	}
	return api.NewClient(cfg.AdminSocket()), nil
}

func newDiskCreateCmd(a *app) *cobra.Command {
	var poolName string
	cmd := &cobra.Command{
		Use:   "create NAME SIZE",
		Short: "Create an empty disk",
		Long:  "Create an empty disk of SIZE (10GiB, 500MB, ...; a multiple of 4 KiB from 1 MiB to 64 TiB).",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDiskCreate(cmd.Context(), a, poolName, args[0], args[1])
		},
	}
	cmd.Flags().StringVar(&poolName, "pool", "", "pool to create it in; needed if the gateway has several")
	return cmd
}

func runDiskCreate(ctx context.Context, a *app, poolName, name, sizeText string) error {
	if err := config.CheckDiskName(name); err != nil {
		return usagef("%w", err)
	}
	size, err := config.ParseSize(sizeText)
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
	d, err := c.CreateDisk(ctx, api.NewDisk{Pool: poolName, Name: name, SizeBytes: int64(size)})
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(d)
	}
	fmt.Fprintf(a.stdout, "disk %s: %s in pool %s\n", d.Name, sized(d.SizeBytes), d.Pool)
	return nil
}

func newDiskListCmd(a *app) *cobra.Command {
	var deleted bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the disks",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if deleted {
				return a.listDeleted(cmd.Context())
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			ds, err := c.Disks(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(ds)
			}
			return printDisks(a.stdout, ds)
		},
	}
	cmd.Flags().BoolVar(&deleted, "deleted", false, "list those that were deleted and can be had back")
	return cmd
}

func newDiskShowCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one disk: size, what is not yet published, newest cut",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.Disk(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(d)
			}
			return printDisks(a.stdout, []pool.DiskInfo{d})
		},
	}
}

func printDisks(w io.Writer, ds []pool.DiskInfo) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tPOOL\tSIZE\tUNPUBLISHED\tAGE\tCUT\tEPOCH")
	for _, d := range ds {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.0fs\t%d\t%d\n", d.Name, d.Pool, sized(d.SizeBytes),
			sized(d.UnpublishedBytes), d.UnpublishedAgeSecond, d.PublishedCut, d.Epoch)
	}
	return t.Flush()
}
