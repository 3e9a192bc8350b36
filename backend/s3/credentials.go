package s3

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// Keys are the credentials of an account, a user or a session.
type Keys struct{ AccessKey, SecretKey, SessionToken string }

const (
	keysTTL            = time.Minute     // how long what Options.Keys said is believed
	roleMargin         = 5 * time.Minute // a role's credentials are renewed so long before they expire
	sessionNameDefault = "graindisk"
)

// credentials finds the region and who asks. A role or a chain is asked when the first request is made.
func (o Options) credentials(ctx context.Context, httpClient *http.Client) (string, aws.CredentialsProvider, error) {
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
	return region, taggedCredentials{creds}, nil
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
	so := sts.Options{Region: region, Credentials: creds, Retryer: newRetryer()}
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

// taggedCredentials lets errors of getting credentials be told from those of using them.
type taggedCredentials struct{ aws.CredentialsProvider }

type noCredentials struct{ error }

func (e noCredentials) Unwrap() error { return e.error }

// Retrieve implements aws.CredentialsProvider.
func (c taggedCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	got, err := c.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return got, noCredentials{err}
	}
	return got, nil
}
