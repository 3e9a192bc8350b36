package s3

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"graindisk/backend"
)

// Keys are the credentials of an account, a user or a session.
type Keys struct{ AccessKey, SecretKey, SessionToken string }

const (
	keysTTL            = time.Minute     // how long what Options.Keys said is believed
	roleMargin         = 5 * time.Minute // a role's credentials are renewed so long before they expire
	sessionNameDefault = "graindisk"
)

// stsAttempts of a request to the service that gives roles, which is not the store: Options.Attempts is not for it.
const stsAttempts = 3

// credentials finds the region and who asks. A role or a chain is asked when the first request is made.
func (o Options) credentials(ctx context.Context, httpClient *http.Client) (string, *keyring, error) {
	region, from, err := o.provider(ctx, httpClient)
	if err != nil {
		return "", nil, err
	}
	o.Region = region // it does not change with the keys
	k := &keyring{build: func(ctx context.Context) (aws.CredentialsProvider, error) {
		_, from, err := o.provider(ctx, httpClient)
		return from, err
	}}
	k.from.Store(&from)
	return region, k, nil
}

// provider reads what says where the keys are: the files of the chain are read here, once, and not when it is asked.
func (o Options) provider(ctx context.Context, httpClient *http.Client) (string, aws.CredentialsProvider, error) {
	region := o.Region
	var creds aws.CredentialsProvider
	switch {
	case o.AccessKey != "":
		creds = credentials.NewStaticCredentialsProvider(o.AccessKey, o.SecretKey, o.SessionToken)
	case o.Keys != nil:
		creds = aws.NewCredentialsCache(rotated(o.Keys))
	}
	if creds == nil || region == "" && o.Endpoint == "" {
		chain, err := config.LoadDefaultConfig(ctx, o.shared()...)
		if err != nil {
			return "", nil, fmt.Errorf("read the AWS configuration: %w", err)
		}
		if creds == nil {
			creds = chain.Credentials
		}
		if region == "" {
			region = chain.Region
		}
	}
	if region == "" && o.Endpoint != "" {
		region = "us-east-1" // most other servers accept it or ignore it
	}
	if region == "" {
		return "", nil, fmt.Errorf("no region for bucket %s: give one, or set AWS_REGION", o.Bucket)
	}
	if o.RoleARN != "" {
		creds = o.role(region, creds, httpClient)
	}
	return region, creds, nil
}

// shared tells the chain where to look.
func (o Options) shared() []func(*config.LoadOptions) error {
	opts := []func(*config.LoadOptions) error{config.WithAssumeRoleCredentialOptions(func(a *stscreds.AssumeRoleOptions) {
		if a.RoleSessionName == "" {
			a.RoleSessionName = sessionNameDefault
		}
	})}
	if o.Profile != "" {
		opts = append(opts, config.WithSharedConfigProfile(o.Profile))
	}
	if o.ConfigFile != "" {
		opts = append(opts, config.WithSharedConfigFiles([]string{o.ConfigFile}))
	}
	if o.CredentialsFile != "" {
		opts = append(opts, config.WithSharedCredentialsFiles([]string{o.CredentialsFile}))
	}
	return opts
}

// role is what the role's owner gives to whom creds belong. An STS of one's own is behind the same
// certificate authorities as the store.
func (o Options) role(region string, creds aws.CredentialsProvider, httpClient *http.Client) aws.CredentialsProvider {
	so := sts.Options{Region: region, Credentials: creds, Retryer: newRetryer(stsAttempts)}
	if o.STSEndpoint != "" {
		so.BaseEndpoint, so.HTTPClient = aws.String(o.STSEndpoint), httpClient
	}
	provider := stscreds.NewAssumeRoleProvider(sts.New(so), o.RoleARN, func(a *stscreds.AssumeRoleOptions) {
		a.RoleSessionName = sessionNameDefault
		if o.SessionName != "" {
			a.RoleSessionName = o.SessionName
		}
		if o.ExternalID != "" {
			a.ExternalID = aws.String(o.ExternalID)
		}
	})
	return aws.NewCredentialsCache(provider, func(c *aws.CredentialsCacheOptions) { c.ExpiryWindow = roleMargin })
}

// rotated asks for keys that may have been replaced.
type rotated func(ctx context.Context) (Keys, error)

// Retrieve implements aws.CredentialsProvider.
func (r rotated) Retrieve(ctx context.Context) (aws.Credentials, error) {
	k, err := r(ctx)
	if err != nil {
		return aws.Credentials{}, err
	}
	return aws.Credentials{
		AccessKeyID: k.AccessKey, SecretAccessKey: k.SecretKey, SessionToken: k.SessionToken,
		Source: "graindisk", CanExpire: true, Expires: time.Now().Add(keysTTL),
	}, nil
}

// keyring gives the keys of the moment to whoever signs, and can get them anew. Safe for concurrent use.
type keyring struct {
	build func(context.Context) (aws.CredentialsProvider, error) // reads again where they come from
	from  atomic.Pointer[aws.CredentialsProvider]
	last  atomic.Pointer[given] // nil before the first

	renewing sync.Mutex // held while they are had anew
}

// given is what a keyring gave last.
type given struct {
	keys  Keys
	since time.Time // when others were replaced without renew's doing: the cache's time was up; else zero
}

// rotationLag is how long after the keys have changed by themselves a call may yet be refused that began before.
const rotationLag = time.Minute

// noCredentials lets errors of getting credentials be told from those of using them.
type noCredentials struct{ error }

func (e noCredentials) Unwrap() error { return e.error }

// Retrieve implements aws.CredentialsProvider.
func (k *keyring) Retrieve(ctx context.Context) (aws.Credentials, error) {
	got, err := (*k.from.Load()).Retrieve(ctx)
	if err != nil {
		return got, noCredentials{err}
	}
	is := keysOf(got)
	switch was := k.last.Load(); {
	case was == nil:
		k.last.CompareAndSwap(nil, &given{keys: is})
	case was.keys != is:
		k.last.CompareAndSwap(was, &given{keys: is, since: time.Now()})
	}
	return got, nil
}

// renew asks for the keys where they come from, past every cache, and reports whether a call that was refused may
// have had others. After an error the old ones stay in use.
func (k *keyring) renew(ctx context.Context) (changed bool, err error) {
	k.renewing.Lock()
	defer k.renewing.Unlock()
	from, err := k.build(ctx)
	if err != nil {
		return false, err
	}
	got, err := from.Retrieve(ctx)
	if err != nil {
		_, cause := classify(noCredentials{err})
		return false, cause
	}
	is := &given{keys: keysOf(got)}
	was := k.last.Swap(is)
	k.from.Store(&from)
	return was == nil || was.keys != is.keys || time.Since(was.since) < rotationLag, nil
}

func keysOf(c aws.Credentials) Keys { return Keys{c.AccessKeyID, c.SecretAccessKey, c.SessionToken} }

var _ backend.Refresher = (*Store)(nil)

// Refresh implements backend.Refresher: keys, files and profiles are read again, and a role is assumed again.
func (s *Store) Refresh(ctx context.Context) (changed bool, err error) {
	if changed, err = s.keys.renew(ctx); err != nil {
		return false, fmt.Errorf("s3: get the credentials again: %w", err)
	}
	return changed, nil
}
