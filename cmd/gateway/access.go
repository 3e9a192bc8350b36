package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"graindisk/config"
	"graindisk/frontend/nbd"
	"graindisk/internal/access"
)

// grantsOf are the rules of the configured disks, by name. A disk without any is not in it.
func grantsOf(cfg *config.Config) (map[string]access.Grants, error) {
	grants := map[string]access.Grants{}
	for _, p := range cfg.Pools {
		for _, d := range p.Disks {
			if len(d.Allow) == 0 && len(d.AllowRead) == 0 {
				continue
			}
			var g access.Grants
			var err error
			if g.Write, err = access.ParseAll(d.Allow); err != nil {
				return nil, fmt.Errorf("disk %s: %w", d.Name, err)
			}
			if g.Read, err = access.ParseAll(d.AllowRead); err != nil {
				return nil, fmt.Errorf("disk %s: %w", d.Name, err)
			}
			grants[d.Name] = g
		}
	}
	return grants, nil
}

// setAccess puts the disks' rules in force for whoever connects from now on.
func (g *gateway) setAccess(cfg *config.Config) error {
	grants, err := grantsOf(cfg)
	if err == nil {
		g.grants.Store(&grants)
	}
	return err
}

// level implements the Access option of the NBD frontend.
func (g *gateway) level(p access.Peer, disk string) access.Level {
	return (*g.grants.Load())[disk].Level(p)
}

// listenOptions are those of each configured NBD listener. They read the TLS files.
func listenOptions(cfg *config.Config, log *slog.Logger) ([]nbd.ListenOptions, error) {
	var los []nbd.ListenOptions
	for _, l := range cfg.Listen.NBD {
		lo := nbd.ListenOptions{AckStable: l.Ack == config.AckStable, TLSRequired: l.TLS == config.TLSRequire}
		var err error
		if lo.Allow, err = access.ParseAll(l.Allow); err == nil && (l.TLS == config.TLSOffer || l.TLS == config.TLSRequire) {
			lo.TLS, err = nbd.NewTLS(nbd.TLSFiles{Certificate: l.Certificate, Key: l.Key, ClientCA: l.ClientCA}, log.With("listener", l.Address))
		}
		if err != nil {
			return nil, fmt.Errorf("listener %s: %w", l.Address, err)
		}
		los = append(los, lo)
	}
	return los, nil
}

// reloader reads the configuration again at every SIGHUP. It exists before there is anything to
// reload, since the signal would end the process otherwise.
type reloader struct {
	hup  chan os.Signal
	load func() (*config.Config, error)
}

func newReloader(load func() (*config.Config, error)) *reloader {
	r := &reloader{make(chan os.Signal, 1), load}
	signal.Notify(r.hup, syscall.SIGHUP)
	return r
}

func (r *reloader) stop() { signal.Stop(r.hup) }

// run puts the disks' access rules of each new configuration in force, until ctx ends; nothing else of
// it is looked at. A configuration with problems changes nothing.
func (r *reloader) run(ctx context.Context, g *gateway, srv *nbd.Server, log *slog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.hup:
		}
		cfg, err := r.load()
		if err == nil {
			err = g.setAccess(cfg)
		}
		if err != nil {
			log.Error("access rules not reloaded; those in force stay", "error", err)
			continue
		}
		srv.Recheck()
		log.Info("access rules of the disks reloaded; other changes wait for a restart")
	}
}
